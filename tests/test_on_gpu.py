"""The command for a day on a GPU: stages, their files, what goes on after an interruption."""

import json
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.fixture
def made(monkeypatch):
    """Two stages of ours in place of the real ones; the second one fails at first."""
    from benchmarks import gpu_day

    calls = []

    def measure(key, row):
        calls.append(key)
        if isinstance(row, Exception):
            raise row
        return row

    def list_first(day):
        yield "a", lambda: measure("a", {"ms": 1.5})
        yield "b", lambda: measure("b", [{"ms": 2.0}, {"ms": 3.0, "what": "two"}])
        yield "c", lambda: measure("c", ValueError("out of memory"))

    monkeypatch.setattr(gpu_day, "STAGES", {"first": gpu_day.Stage(10, list_first)})
    return calls


def test_a_stage_writes_its_rows_and_what_failed(made, tmp_path):
    import on_gpu

    on_gpu.run_stage("first", tmp_path, rehearse=True)
    held = json.loads((tmp_path / "first.json").read_text())
    assert held["complete"] and held["about"]["platform"] == "cpu"
    assert [row["key"] for row in held["rows"]] == ["a", "b", "b", "c"]
    assert held["rows"][-1]["failed"] == "ValueError: out of memory"
    text = on_gpu.make_tables(tmp_path)
    assert "first: cpu, " in text and "| 3 | two |" in text


def test_a_stage_goes_on_where_it_stopped(made, tmp_path):
    import on_gpu

    on_gpu.run_stage("first", tmp_path, rehearse=True)
    held = json.loads((tmp_path / "first.json").read_text())
    cut = held | {"complete": False, "keys": ["a"], "rows": held["rows"][:1]}
    (tmp_path / "first.json").write_text(json.dumps(cut))
    made.clear()
    on_gpu.run_stage("first", tmp_path, rehearse=True)
    assert made == ["b", "c"]
    assert json.loads((tmp_path / "first.json").read_text())["rows"] == held["rows"]


def test_stages_have_their_own_time_and_are_not_run_twice(monkeypatch, tmp_path, capsys):
    import on_gpu
    from benchmarks import gpu_day

    stages = {name: gpu_day.Stage(2, lambda day: iter(())) for name in ("slow", "quick")}
    monkeypatch.setattr(gpu_day, "STAGES", stages)
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys, time\n"
        "out, stage = sys.argv[2], sys.argv[4]\n"
        "time.sleep(60 * (stage == 'slow'))\n"
        "json.dump({'complete': True, 'rows': [1, 2]}, open(f'{out}/{stage}.json', 'w'))\n"
    )
    monkeypatch.setattr(on_gpu, "__file__", str(script))
    began = time.monotonic()
    on_gpu.run_stages(tmp_path, 1.0, (), rehearse=True)
    assert time.monotonic() - began < 30
    said = capsys.readouterr().out
    assert "slow: out of time, 0 rows" in said and "quick: done, 2 rows" in said
    on_gpu.run_stages(tmp_path, 0.01, (), rehearse=True)
    said = capsys.readouterr().out
    assert "slow: no time left" in said and "quick: done before" in said


def test_an_unknown_stage_is_named(tmp_path):
    import on_gpu

    with pytest.raises(SystemExit, match="unknown stage nope: use correct, ceilings, attention"):
        on_gpu.run_stages(tmp_path, 1.0, ("nope",), rehearse=True)


@pytest.mark.slow
def test_every_stage_is_rehearsed(tmp_path):
    import on_gpu
    from benchmarks.gpu_day import STAGES

    on_gpu.run_stages(tmp_path, 9.0, (), rehearse=True)
    for name in STAGES:
        held = json.loads((tmp_path / f"{name}.json").read_text())
        assert held["complete"], name
        assert held["rows"], name
        assert not any("failed" in row for row in held["rows"]), held["rows"]
    right = [row["right"] for row in json.loads((tmp_path / "correct.json").read_text())["rows"]]
    assert right and all(right)
    assert sys.version.split()[0] in on_gpu.make_tables(tmp_path)


def test_a_wrong_kernel_is_noticed(monkeypatch):
    from benchmarks import gpu_day

    op = gpu_day.SOFT_MOE
    arrays = gpu_day.shape_soft_moe(1, 9, 8, "float32", masked=False)

    def wrong(name, *given):
        return op.run(name, *given) * (1.001 if name == "xla" else 1.0)

    rows = gpu_day.check_op(op._replace(run=wrong), arrays)
    assert {row["implementation"]: row["right"] for row in rows} == {
        "xla": False,
        "reference": True,
    }
