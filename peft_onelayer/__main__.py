"""`python -m peft_onelayer`: the command `onelayer`."""

from onelayer_cli.main import main  # type: ignore[import-not-found]  # installed from cli/

if __name__ == "__main__":
    main()
