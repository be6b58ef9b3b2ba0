"""What the README shows works: Python blocks run, commands parse, files and targets exist."""

import re
import shlex
from pathlib import Path

import pytest

from lit_wm.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/data.md",
    "docs/offline.md",
    "docs/planning.md",
    "docs/scripts.md",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line
]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_a_python_block_runs(code, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("lit-wm fit --config") and "sources" not in c]
)
def test_a_fit_command_trains(command, tmp_path, monkeypatch):
    if "atari" in command:
        pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    monkeypatch.chdir(tmp_path)
    # Three updates of a tiny model in one process; flags win over files, hence the flags.
    overlay = f"configs/overlay/debug{'_tdmpc2' * ('tdmpc2' in command)}.yaml"
    small = ["--config", overlay, "--model.preset", "debug", "--trainer.devices", "1"]
    assert main([*shlex.split(command)[1:], *small, "--trainer.logger", "false"]) == 0


def test_the_commands_for_own_data_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("LITWM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    section = README.split("## Your own data")[1].split("## Commands")[0]
    block, shown = re.findall(r"^```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    printed = ""
    for command in block.splitlines():
        overlay = f"debug{'_tdmpc2' * ('tdmpc2' in command)}.yaml"
        small = f"--config configs/overlay/{overlay} --model.preset debug --trainer.devices 1"
        small += " --trainer.logger false --trainer.max_steps 3"
        words = shlex.split(command, comments=True)[1:]
        assert main([*words, *(small.split() if " fit " in command else ())]) == 0
        out = capsys.readouterr().out
        printed += out if re.search("inspect|doctor", command) else ""
    rounded = re.compile(r"[-\d.,]*\d")  # other versions of NumPy may differ in the last digits
    assert rounded.sub("0", printed) == rounded.sub("0", shown)


def test_every_verb_shown_exists():
    from lit_wm.cli import TRAINING_VERBS

    verbs = {command.split()[1] for command in COMMANDS if command.startswith("lit-wm ")}
    assert verbs == {*TRAINING_VERBS, "evaluate", "convert", "explain", "presets", "data", "collect"}


def test_every_make_target_shown_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        shown = set(
            re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", (ROOT / document).read_text(), flags=re.MULTILINE)
        )
        assert shown <= targets, document


def test_every_file_shown_exists():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for path in re.findall(r"`((?:configs|lit_wm|datamodules|tests|docs)/[\w./]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{document}: {path}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / document).parent / link).exists(), f"{document}: {link}"


def test_the_documents_write_into_the_ignored_folder_only():
    assert "/data/" in (ROOT / ".gitignore").read_text().splitlines()
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        ways = r"(?:^lit-wm .* (?:-o|--video) |--out (?:rows|npz):|save\(\")([^\s\")]+)"
        found = re.findall(ways, text, re.M)
        assert all(path.startswith("data/") for path in found), (document, found)


def test_the_documents_collect_each_dataset_once():
    commands = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    out = re.findall(r"^lit-wm collect .*--out (\S+)", commands, re.M)
    assert len(out) == len(set(out)), out
