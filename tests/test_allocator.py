"""The C library's allocator keeps the memory that a step frees."""

import platform

import forked
import pytest

FAULTS = """
import resource, torch
from torch_utils import distributed

def faults():
    for _ in range(4):
        torch.empty(16 << 20).fill_(1.0)  # 64 MiB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

distributed.init("cpu")
for _ in range(4):
    before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have other settings")
@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept(tmp_path, variables, kept):
    """Counted in pages that the system had to clear. Settings in the user's environment are respected."""
    printed = forked.run(["-c", FAULTS], tmp_path, env=variables)
    assert (int(printed) < 64) == kept  # 128 would be cleared with the largest pages
