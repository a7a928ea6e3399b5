"""Numbers and names that several tests use."""

import os

import torch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How many times as long the fuzz tests take: `make fuzz`.
FUZZ = int(os.environ.get("MEERKAT_FUZZ", "1"))
# Property of a test's report: method, task, change of the held-out loss, elements; a table when the tests are over.
COMBINATION = "combination"
