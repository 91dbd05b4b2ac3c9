import vllm


def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func):
    vllm.SENT.put([post_iter_func(item).clone() for item in iterator])
