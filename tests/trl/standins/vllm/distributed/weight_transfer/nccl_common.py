from types import SimpleNamespace


def trainer_init(init_info):
    return SimpleNamespace(group=SimpleNamespace(store=None, socket=None))
