"""A run that was cut off goes on at the step where it was, and leaves the same bytes as one that never was."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import TINY, VARIANTS, differing, digest
from slmreason.cli import main
from slmreason.cli.runs import program
from slmreason.curriculum.resume import checkpoints, newest_checkpoint
from slmreason.run.folder import lock_folder
from tests.runs import ONE, ROOT, SMALL, TWO, command, long, pool_with_traces

pytestmark = pytest.mark.slow
OFTEN = "--curriculum.checkpoint.every_n_steps=1"
FULL = [*TINY, *VARIANTS["full"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command("fit", *FULL, f"--run_dir={folder}")
    assert done.returncode == 0, done.stdout[-3000:]
    return digest(folder)


@pytest.mark.long
@pytest.mark.timeout(1500)  # it starts some twenty runs, one after another
def test_many_kills_at_every_kind_of_moment_leave_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--kills=15", "--kills-per-run=5", "--seed=7", f"--out={out}",
         f"--folder={tmp_path}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    variants = json.loads(out.read_text())["variants"]
    assert sum(row["kills"] for row in variants) >= 13
    assert len({point for row in variants for point in row["at"]}) >= 6
    assert all(row["files"] > 20 and row["differing"] == [] for row in variants)


@pytest.mark.parametrize(
    "processes",
    [["--student.lora.r=8", *ONE], long([*TWO, "--trainer.strategy=fsdp", "--sft.loss=psft"]),
     long([*TWO, "--trainer.strategy=ddp"]), long([*TWO, "--trainer.strategy=fsdp", "--trainer.precision=bf16-true"])],
    ids=["one", "fsdp-psft", "ddp", "half-fsdp"],
)  # fmt: skip
def test_several_processes_go_on_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[str]
) -> None:
    args = ["fit", *SMALL, *processes, OFTEN, "--trainer.callbacks+=tests.plugins.Dies", "--grpo.kl=0.01",
            "--grpo.prompts_per_step=2"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command(*args, f"--run_dir={whole}")
    assert done.returncode == 0, done.stdout[-3000:]
    for stage, batch in (("sft", 2), ("grpo", 1), ("cft", 0)):
        monkeypatch.setenv("DIES_IN", stage)
        monkeypatch.setenv("DIES_AT", str(batch))
        died = command(*args, f"--run_dir={cut}", "--resume=auto")
        assert died.returncode != 0
        found = newest_checkpoint(cut)
        assert found is not None
        within = found[1].within
        if batch:
            assert within is not None
            assert within.stage == stage
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(cut), digest(whole)) == []
    assert not list(tmp_path.glob("cut-*"))


@pytest.mark.parametrize("processes", [long(ONE), [*TWO, "--trainer.strategy=fsdp"]], ids=["one", "two"])
def test_sigterm_in_a_fit_saves_and_leaves_with_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[str]
) -> None:
    args = ["fit", *SMALL, *processes, "--trainer.callbacks+=tests.plugins.Dies", f"--run_dir={tmp_path / 'run'}"]
    monkeypatch.setenv("DIES_BY", "SIGTERM")
    monkeypatch.setenv("DIES_IN", "sft")
    monkeypatch.setenv("DIES_AT", "1")
    done = command(*args, "--curriculum.stages=[sft]")
    assert done.returncode == 143, done.stdout[-3000:]
    assert done.stdout.count(f"what has been done is kept, go on with: {program()} fit --resume {tmp_path}/run\n") == 1
    newest = checkpoints(tmp_path / "run")[-1]
    assert "in-round-1-sft-epoch-1-batch-2" in newest.name
    monkeypatch.delenv("DIES_IN")
    done = command(*args, "--curriculum.stages=[sft]", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"going on in round 1 sft, epoch 1: {newest.name}" in " ".join(done.stdout.split())


@pytest.mark.long
def test_a_fit_that_draws_its_problems_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", *SMALL, OFTEN, "--curriculum.stages=[grpo]", "--trainer.callbacks+=tests.plugins.Dies",
            "--grpo.prompts_per_step=2", "--grpo.order=informative", "--grpo.cooldown=1", "--grpo.max_sampled_groups=4",
            "--benchmarks=[]"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command(*args, f"--run_dir={whole}")
    assert done.returncode == 0, done.stdout[-3000:]
    monkeypatch.setenv("DIES_IN", "grpo")
    monkeypatch.setenv("DIES_AT", "2")
    assert command(*args, f"--run_dir={cut}", "--resume=auto").returncode != 0
    found = newest_checkpoint(cut)
    assert found is not None
    assert found[1].within is not None
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(cut), digest(whole)) == []


@pytest.mark.long
def test_a_run_that_predicts_rho_goes_on_and_shows_what_that_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_with_traces(tmp_path / "pool.jsonl", 120)
    args = ["fit", *SMALL, OFTEN, f"--data.train={pool}", "--data.columns.trace=trace", "--sft.epochs=1",
            "--data.bands.evidence_model=posterior", "--curriculum.probe.predictor=forward", "--benchmarks=[]",
            "--curriculum.probe.certain=0.6", "--curriculum.probe.epoch_share=0.3", "--curriculum.stages=[sft,grpo]",
            "--grpo.prompts_per_step=8", "--trainer.callbacks+=tests.plugins.Dies"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command(*args, f"--run_dir={whole}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "rho predicted from traces: rank correlation" in done.stdout
    stages = {stage["stage"]: stage for stage in json.loads((whole / "summary.json").read_text())}
    [predicted] = stages["round 1 sft"]["predicted"]
    assert predicted["spared"] > 0
    assert predicted["rank_correlation"] > 0.2
    assert stages["round 1 sft"]["tokens"]["scored"] == predicted["scored"] > 0
    assert "predictor/rank_correlation" in (whole / "round-01" / "sft" / "metrics.csv").read_text().splitlines()[0]
    strata = json.loads((whole / "round-01" / "sft" / "strata.jsonl").read_text().splitlines()[0])
    assert strata["predictor"]["bands"] == predicted["spared"]
    monkeypatch.setenv("DIES_AT", "1")
    for stage in ("sft", "grpo"):
        monkeypatch.setenv("DIES_IN", stage)
        assert command(*args, f"--run_dir={cut}", "--resume=auto").returncode != 0
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(cut), digest(whole)) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", ["handover", "chord"])
def test_a_fit_that_rescues_goes_on_in_the_middle_of_an_epoch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", *SMALL, OFTEN, "--curriculum.stages=[sft, grpo]", "--sft.epochs=1", "--benchmarks=[]",
            "--sft.learning_rate=1e-5", "--data.routing=all", "--trainer.callbacks+=tests.plugins.Dies",
            "--grpo.prompts_per_step=8", f"--grpo.rescue.kind={kind}"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command(*args, f"--run_dir={whole}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "grpo.rescue: 0 of" not in " ".join(done.stdout.split())
    assert "have a trace that they may be rescued with" in " ".join(done.stdout.split())
    monkeypatch.setenv("DIES_IN", "grpo")
    monkeypatch.setenv("DIES_AT", "1")
    assert command(*args, f"--run_dir={cut}", "--resume=auto").returncode != 0
    found = newest_checkpoint(cut)
    assert found is not None
    assert found[1].within is not None
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(cut), digest(whole)) == []


@pytest.mark.long
def test_control_c_in_a_fit_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", *SMALL, *ONE, OFTEN, "--trainer.callbacks+=tests.plugins.Dies", f"--run_dir={tmp_path / 'run'}",
            "--curriculum.stages=[sft]"]  # fmt: skip
    monkeypatch.setenv("DIES_BY", "SIGINT")
    monkeypatch.setenv("DIES_IN", "sft")
    monkeypatch.setenv("DIES_AT", "2")
    # A shell that starts the tests in the background has them ignore it.
    done = command(*args, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode == 130, done.stdout[-3000:]
    assert "stopped from the keyboard" in done.stdout
    assert "Traceback" not in done.stdout
    monkeypatch.delenv("DIES_IN")
    done = command(*args, "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "going on in round 1 sft" in done.stdout


@pytest.mark.long
def test_sigterm_while_measuring_leaves_at_once_and_a_second_process_is_refused(
    tmp_path: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = ["fit", *FULL, f"--run_dir={run}"]
    first = subprocess.Popen(
        [sys.executable, "-m", "slmreason.cli", *args], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("pool:"):
            break
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert main([*args, "--resume=auto"]) == 2
        assert f"in use by process {first.pid} on " in capsys.readouterr().err
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.send_signal(signal.SIGTERM)
    output = first.stdout.read()
    assert first.wait(30) == 143
    assert f"go on with: {program()} fit --resume {run}\n" in output
    assert main([*args, "--resume=auto"]) == 0
    assert differing(digest(run), undisturbed) == []


@pytest.mark.parametrize("megabytes", [long(0.006), 2, long(5)])
def test_a_full_disk_ends_the_run_with_one_message_and_what_was_saved_whole(
    tmp_path: Path, undisturbed: dict[str, str], megabytes: float
) -> None:
    """The ledger cannot grow; the first checkpoint cannot be written; the first with an optimizer's state cannot."""
    run, most = tmp_path / "run", int(megabytes * 2**20)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
    done = command("fit", *FULL, f"--run_dir={run}", preexec_fn=limit)
    assert done.returncode == 1, done.stdout[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("error:")] == [lines[-1]]
    assert "File too large" in lines[-1]
    assert str(run) in lines[-1]
    assert lines[-1].endswith(f"make room and go on with: {program()} fit --resume {run}")
    assert "Traceback" not in done.stdout
    assert not list(run.rglob(".*.tmp"))
    assert [newest_checkpoint(run) is not None] == [bool(checkpoints(run))]
    done = command("fit", *FULL, f"--run_dir={run}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(run), undisturbed) == []


@pytest.mark.long
def test_a_torn_checkpoint_is_passed_over_and_old_ones_are_removed(
    tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = ["fit", *FULL, f"--run_dir={run}", "--trainer.callbacks+=tests.plugins.Dies"]
    monkeypatch.setenv("DIES_IN", "grpo")
    monkeypatch.setenv("DIES_AT", "3")
    assert command(*args).returncode == -signal.SIGKILL
    names = [path.name.partition("-")[2] for path in checkpoints(run)]
    assert names == [
        "after-round-2-sft.ckpt", "in-round-2-grpo-epoch-1-batch-2.ckpt", "in-round-2-grpo-epoch-1-batch-3.ckpt"
    ]  # fmt: skip
    newest = checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    for path in checkpoints(run):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.delenv("DIES_IN")
    done = command(*args, "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    shown = " ".join(done.stdout.split())
    assert "batch-3.ckpt cannot be read; an older checkpoint is looked for" in shown
    assert "going on in round 2 grpo, epoch 1: 0" in shown
    assert differing(digest(run), undisturbed) == []
    for path in checkpoints(run):
        path.write_bytes(path.read_bytes()[:-1000])
    assert main([*args, "--resume=auto"]) == 2
    assert "no checkpoint can be read, so the run cannot go on" in capsys.readouterr().err


def test_another_config_is_refused_with_the_keys_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "--curriculum.stages=[grpo]", "--trainer.devices=1", f"--run_dir={tmp_path / 'run'}"]
    assert main(["fit", *small]) == 0
    assert main(["fit", *small, "--grpo.kl=0.1", "--resume=auto"]) == 2
    error = capsys.readouterr().err
    assert "differs in grpo.kl (0.0 then, 0.1 now)" in error
    assert main(["fit", *small, f"--resume={tmp_path / 'nothing'}"]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["fit", f"--resume={tmp_path / 'nothing'}"]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["fit", *small, "--resume=auto", "--curriculum.checkpoint.every_minutes=1"]) == 0  # may change
    before = digest(tmp_path / "run")
    assert main(["fit", *small, "--resume=auto"]) == 0  # nothing is left to do
    assert digest(tmp_path / "run") == before


def test_a_folder_is_free_again_when_its_process_is_gone(tmp_path: Path) -> None:
    code = (
        f"from slmreason.run.files import lock_folder; from pathlib import Path; lock_folder(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code + "; import os; os.kill(os.getpid(), 9)"], cwd=ROOT, check=False)
    lock_folder(tmp_path).close()


def command_in(output: str) -> list[str]:
    """The last command that the output says goes on with the run, as a shell would split it."""
    lines = [line.partition("go on with: ")[2] for line in output.splitlines() if "go on with: " in line]
    program_name, *rest = shlex.split(lines[-1].removeprefix(program()).strip() or "none")
    assert program_name == "fit"
    return [program_name, *rest]


@pytest.mark.long
def test_auto_goes_on_with_the_newest_unfinished_run_of_this_config(
    tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished one, one that was killed, one by another config that was killed, in this order."""
    args = ["fit", *FULL, "--trainer.callbacks+=tests.plugins.Dies", f"--run_dir={tmp_path / 'run'}"]
    assert command(*args).returncode == 0
    monkeypatch.setenv("DIES_IN", "grpo")
    assert command(*args).returncode == -signal.SIGKILL
    assert command(*args, "--grpo.clip_high=0.3").returncode == -signal.SIGKILL
    monkeypatch.delenv("DIES_IN")
    before = digest(tmp_path / "run")
    assert main([*args, "--resume=auto"]) == 0
    shown = capsys.readouterr().out
    assert f"run folder: {tmp_path / 'run-2'}\n" in shown
    assert f"{tmp_path / 'run'}: finished" in shown
    assert f"{tmp_path / 'run-3'}: by another config, which differs in grpo.clip_high (0.3 then, 0.28 now)" in shown
    assert differing(digest(tmp_path / "run-2"), undisturbed) == []
    assert digest(tmp_path / "run") == before
    assert main([*args, "--resume=auto"]) == 0
    assert "no run by this config is unfinished" in capsys.readouterr().out
    assert main([*args, "--resume=auto", "--grpo.clip_high=0.4"]) == 2
    refused = capsys.readouterr().err
    assert refused.count("by another config, which differs in grpo.clip_high") == 3
    assert not (tmp_path / "run-4").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["run", 'a run\'s "folder" $HOME'])
def test_the_command_that_is_printed_goes_on_when_time_is_up(
    tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The clock is up in the middle of SFT; with the time that the command has it ends as one that was not stopped."""
    run = tmp_path / name
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = command("fit", *FULL, f"--run_dir={run}", "--trainer.max_time=00:00:00:01")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "trainer.max_time is used up" in done.stdout
    assert (run / "student").is_dir()
    goes_on = command_in(done.stdout)
    assert goes_on[:3] == ["fit", "--resume", str(run)]
    [budget] = goes_on[3:]
    assert budget > "--trainer.max_time=00:00:00:01"
    done = command(*goes_on[:3], "--trainer.max_time=01:00:00:00")
    assert done.returncode == 0, done.stdout[-3000:]
    assert differing(digest(run), undisturbed) == []


def test_a_run_that_crashes_says_how_it_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("fit", *SMALL, "--curriculum.stages=[sft]", "--trainer.devices=1", f"--run_dir={run}",
                   "--trainer.callbacks+=tests.plugins.Raises")  # fmt: skip
    assert done.returncode == 1
    assert "RuntimeError: as it was told to" in done.stdout
    assert done.stdout.rstrip().endswith(f"what has been done is kept, go on with: {program()} fit --resume {run}")


@pytest.mark.long
def test_a_budget_of_tokens_that_is_spent_may_grow(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("fit", *SMALL, "--trainer.devices=1", f"--run_dir={run}", "--curriculum.max_tokens=8000")
    assert done.returncode == 0, done.stdout[-3000:]
    goes_on = command_in(done.stdout)
    assert goes_on[3:] == ["--curriculum.max_tokens=16000"]
    stages = len(json.loads((run / "summary.json").read_text()))
    done = command(*goes_on)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "going on after" in done.stdout
    assert len(json.loads((run / "summary.json").read_text())) > stages
