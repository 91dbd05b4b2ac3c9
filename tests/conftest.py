import os

import torch

# Matrices this small gain nothing from a second thread, and on a busy machine lose a factor of ten to it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
