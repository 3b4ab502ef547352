"""What may still be taken of memory, on made-up machines."""

import psutil
import pytest

from src.core.memory import available

GB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    def machine(cgroup: str, files: dict[str, dict[str, str | int]]):
        meminfo = f"MemTotal: {64 * GB >> 10} kB\nMemFree: {1 * GB >> 10} kB\nMemAvailable: {40 * GB >> 10} kB\n"
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(meminfo)
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
        for folder, content in files.items():
            place = tmp_path / "sys" / "fs" / "cgroup" / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, value in content.items():
                (place / name).write_text(f"{value}\n")
        return tmp_path

    return machine


def limit(most, used: int, cache: int) -> dict:
    return {"memory.max": most, "memory.current": used, "memory.stat": f"anon {used - cache}\ninactive_file {cache}"}


def test_the_page_cache_is_no_used_memory(machine):
    assert available(machine("0::/\n", {})) == 40 * GB


def test_a_container_of_either_version_bounds_it(machine):
    files = {"a": limit(16 * GB, 12 * GB, 9 * GB), "a/b": limit("max", 12 * GB, 9 * GB)}
    assert available(machine("0::/a/b\n", files)) == 13 * GB, "the limit is on the group above"


def test_a_container_that_knows_only_itself(machine):
    files = {"memory": {"memory.limit_in_bytes": 8 * GB, "memory.usage_in_bytes": 3 * GB, "memory.stat": f"total_inactive_file {1 * GB}"}}
    assert available(machine("9:cpu:/x\n8:memory:/docker/1f\n", files)) == 6 * GB


def test_no_limit_is_none_at_all(machine):
    files = {
        "memory/x": {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": GB, "memory.stat": "total_inactive_file 0"}
    }
    assert available(machine("8:memory:/x\n", files)) == 40 * GB


def test_what_is_used_up_is_nothing(machine):
    assert available(machine("0::/\n", {"": limit(GB, 2 * GB, 0)})) == 0


def test_this_machine():
    assert 0 < available() <= psutil.virtual_memory().total
