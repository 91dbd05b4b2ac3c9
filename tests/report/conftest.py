from command import onelayer  # noqa: F401
