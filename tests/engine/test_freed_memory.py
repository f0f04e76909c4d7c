"""Memory that one large batch frees is not faulted in again by the next."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from lightning_gradmetrics.engine.passes.freed_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**18) for _ in range(40)]
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
new_pages(), new_pages()
print(new_pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
def test_freed_memory_is_kept():
    """The 40 MiB are 10,240 pages, most of which are new without the call."""
    command = [sys.executable, "-c", PROGRAM]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 2000
