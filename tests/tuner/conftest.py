import pytest
import torch
import transformers


@pytest.fixture
def gemma3():
    """Builds a tiny multimodal model: a vision tower beside a text decoder."""

    def build(num_layers: int = 4, vision_layers: int = 2) -> torch.nn.Module:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        text = {"vocab_size": 64, "num_hidden_layers": num_layers, "num_key_value_heads": 2, "head_dim": 8, **sizes}
        vision = {"num_hidden_layers": vision_layers, "image_size": 16, "patch_size": 8, **sizes}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63
        )
        torch.manual_seed(0)
        return transformers.Gemma3ForConditionalGeneration(config).eval()

    return build
