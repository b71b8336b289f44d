"""The stand-in CUDA runtime library, what a failed build says, and the cache of built files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ptx
from ptx import build, cache

# ---- the stand-in CUDA runtime library


def test_errors_are_kept_until_they_are_read(library):
    x = torch.zeros(1)
    with ptx.run(on_report="record"):
        error = library.too_many_threads(x, x)
        assert error != 0
        assert library.read_error() == error
        assert library.read_error() == 0
        library.too_many_threads(x, x)
    with ptx.run():
        assert library.read_error() == 0  # a session begins without errors


def test_much_shared_memory_must_be_asked_for(library):
    y = torch.zeros(1)
    with ptx.run("sm_80", on_report="record") as session:
        assert library.dynamic_shared(y, 12 * 1024, 0) == 0
        assert library.dynamic_shared(y, 12 * 1024 + 1, 0) != 0
        assert library.read_error() != 0
        assert library.dynamic_shared(y, 40 * 1024, 1) == 0
        assert library.dynamic_shared(y, 41 * 1024, 1) != 0  # sm_80 has 163 KB for a block
    assert [report.kind for report in session.reports] == ["bad-launch"]


def test_clusters_are_refused(library, executor_session):
    x = torch.zeros(64)
    with pytest.raises(ptx.Refused, match="clusters of more than one block"):
        library.clustered(x, x)


def test_a_function_that_is_not_there_does_not_link(tmp_path):
    source = tmp_path / "timed.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        'extern "C" float timed(cudaEvent_t a, cudaEvent_t b) {\n'
        "  float ms; cudaEventElapsedTime(&ms, a, b); return ms;\n}\n"
    )
    with pytest.raises(build.BuildError, match=r"timed\.cu calls cudaEventElapsedTime"):
        ptx.load(source)


def test_a_source_that_does_not_compile_says_why(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { undeclared(); }\n")
    with pytest.raises(build.BuildError, match="undeclared"):
        ptx.load(source)


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    build.nvcc.cache_clear()
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"nvcc is not found.*toolkit"):
        build.nvcc()
    monkeypatch.setenv("CXX", str(tmp_path / "absent++"))
    with pytest.raises(build.BuildError, match=r"absent\+\+ cannot be started"):
        build.kernel_library(".version 9.0\n.target sm_80\n.address_size 64\n")


# ---- the cache


def test_one_of_many_builders_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("built")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: cache.cached("name", make), range(8)))
    assert len(made) == 1
    assert {(folder / "file").read_text() for folder in folders} == {"built"}


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.cached("name", fail)
    assert not list(tmp_path.glob("name*"))


def test_a_changed_header_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    header = tmp_path / "header"
    compiled = []

    def compile_(folder: Path) -> list[Path]:
        compiled.append(header.read_text())
        return [header]

    folders = []
    for text in ("first", "first", "second", "first"):
        header.write_text(text)
        folders.append(cache.cached_by_reading("recipe", compile_))
    assert compiled == ["first", "second"]
    assert folders[0] == folders[1] == folders[3] != folders[2]
