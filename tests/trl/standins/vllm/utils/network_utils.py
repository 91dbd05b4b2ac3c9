def get_ip() -> str:
    return "127.0.0.1"


def get_open_port() -> int:
    return 1  # nothing listens: tensors stay in this process
