"""Stands in for vLLM where TRL imports it to push weights: the tensors go to a queue instead of over NCCL."""

import queue

__version__ = "0.30.0"
SENT: queue.Queue = queue.Queue()  # one list of tensors for each push


class LLM: ...


class RequestOutput: ...


class SamplingParams: ...
