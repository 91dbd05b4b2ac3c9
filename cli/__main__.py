"""`python -m onelayer_cli`: the command `onelayer`."""

from .main import main

if __name__ == "__main__":
    main()
