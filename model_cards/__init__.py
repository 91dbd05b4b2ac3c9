"""The card template and the cards of example adapters, installed as the data package peft_onelayer.model_cards."""
