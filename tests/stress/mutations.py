"""Each row of docs/reliability.md must fail when the program has a fault: one is put into a copy, and the row is run.

    python -m tests.stress.mutations                     # all rows, which takes an hour; from the project's folder
    python -m tests.stress.mutations test_full_disk      # those whose name holds this

Whether each row failed goes to benchmarks/results/reliability.json.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, run_script, say
from utils import as_json, write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PATIENCE = 1200  # seconds for a row


@dataclass(frozen=True)
class Mutation:
    """A fault: `new` takes the place of `old`, which is in the file once; `broken` says what then happens."""

    row: str
    broken: str
    file: str
    old: str
    new: str

    def put_into(self, folder: Path) -> None:
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise UserError(f"{self.file} does not hold this once, for {self.row}: {self.old!r}; change the table here")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


KILLS, FAULTS = "tests/stress/test_kills.py::test_", "tests/stress/test_faults.py::test_"
FILES, PAGES = "tests/stress/test_files.py::test_", "tests/stress/test_pages.py::test_"
SHARED = "tests/stress/test_shared_cache.py::test_shared_cache"
POWER = "tests/stress/test_power.py::test_power_cuts"
BESIDE = '        with open(temporary, "wb") as file:\n'
UNLIKE = "UNLIKE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error)"
MUTATIONS = [
    Mutation(
        f"{KILLS}signals[SIGKILL]",
        "a resumed run forgets what its optimiser knew",
        "training/state.py",
        'self.optimiser.load_state_dict({"state": saved["optimiser"]["state"], "param_groups": groups})',
        "pass",
    ),
    Mutation(
        f"{KILLS}signals[SIGTERM]",
        "SIGTERM ends a run without a checkpoint",
        "utils.py",
        "numbers = [signal.SIGINT, signal.SIGTERM]",
        "numbers = [signal.SIGINT]",
    ),
    Mutation(
        f"{KILLS}signals[SIGINT]",
        "Ctrl-C ends a run without a checkpoint",
        "train.py",
        "                monitor.save_checkpoint()\n                return False",
        "                return False",
    ),
    Mutation(
        f"{KILLS}kills_at_acts",
        "a file is written over, and not beside",
        "utils.py",
        BESIDE,
        f"        temporary = path\n{BESIDE}",
    ),
    Mutation(
        f"{FAULTS}full_disk",
        "a file is written over, and not beside",
        "utils.py",
        BESIDE,
        f"        temporary = path\n{BESIDE}",
    ),
    Mutation(
        POWER,
        "a file is renamed before it is flushed",
        "utils.py",
        "            file.write(content)\n            file.flush()\n            os.fsync(file.fileno())\n",
        "            file.write(content)\n            file.flush()\n",
    ),
    Mutation(
        POWER,
        "the folder of a new name is not flushed",
        "utils.py",
        "os.replace(temporary, path)\n",
        "os.replace(temporary, path)\n        return\n",
    ),
    Mutation(
        POWER,
        "encoded pictures are not flushed before their manifest",
        "data/features.py",
        "os.fsync(file.fileno())",
        "pass",
    ),
    Mutation(
        SHARED,
        "files of the cache that nobody needs any more are emptied before they are removed",
        "data/features.py",
        "with contextlib.suppress(OSError):  # Windows deletes no file that is mapped\n",
        'with contextlib.suppress(OSError):\n                    path.write_bytes(b"")\n',
    ),
    Mutation(
        f"{FAULTS}no_permission",
        "what the system refuses is no sentence",
        "cli/__init__.py",
        "except OSError as error:\n        message",
        "except FileNotFoundError as error:\n        message",
    ),
    Mutation(
        f"{FAULTS}vanishing",
        "a picture that is gone is replaced by a black one",
        "data/transforms.py",
        'raise UserError(f"there is no picture {path}; check the path")',
        'return Image.new("RGB", (64, 64))',
    ),
    Mutation(f"{FAULTS}two_at_once", "nobody holds the lock", "utils.py", "lock.acquire(timeout=PATIENCE)", "pass"),
    Mutation(
        f"{FAULTS}many_epochs",
        "each epoch leaves 4 MB in memory",
        "training/state.py",
        "progress.history.append(row)",
        'progress.history.append(row)\n        self.left = [*getattr(self, "left", []), torch.ones(1_000_000)]',
    ),
    Mutation(
        f"{FAULTS}many_captions",
        "each batch leaves 4 MB in memory",
        "captioning.py",
        "features = stack(batch)  # (B, D) or (B, L, D)",
        'features = stack(batch)\n            vars(self.model).setdefault("left", []).append(torch.ones(1_000_000))',
    ),
    Mutation(
        f"{FAULTS}poisoned",
        "nothing looks for NaN",
        "training/monitor.py",
        "if step == NO_BAD_STEP and all(bool(p.isfinite().all()) for p in trained):",
        "if step >= 0:",
    ),
    Mutation(
        f"{FAULTS}offline",
        "a script asks for an address, and does without",
        "cli/__init__.py",
        "        return main() or 0",
        "        import contextlib\n        import socket\n\n        with contextlib.suppress(OSError):\n"
        '            socket.getaddrinfo("example.org", 443)\n        return main() or 0',
    ),
    Mutation(
        f"{FILES}cut_checkpoints",
        "what zipfile says of a cut file is no sentence",
        "cli/safe_load.py",
        "zipfile.BadZipFile, struct.error",
        "struct.error",
    ),
    Mutation(
        f"{FILES}evil_checkpoints",
        "a checkpoint is unpickled whatever is in it",
        "cli/safe_load.py",
        "weights_only=True)\n\n\ndef",
        "weights_only=False)\n\n\ndef",
    ),
    Mutation(
        f"{FILES}evil_checkpoints", "a checkpoint is not measured", "cli/safe_load.py", "measure(file)\n        ", ""
    ),
    Mutation(
        f"{FILES}odd_pictures",
        "a picture may have any number of pixels",
        "data/transforms.py",
        "    if picture.width * picture.height > MOST_PIXELS:\n",
        "    if False:\n",
    ),
    Mutation(
        f"{PAGES}hostile_captions",
        "captions are not escaped in the page",
        "render/gallery.py",
        'return re.sub("[<>&\\u2028\\u2029]", lambda found: f"\\\\u{ord(found[0]):04x}", code)',
        "return code",
    ),
    Mutation(
        f"{PAGES}hostile_demo",
        "captions are not escaped in the demo",
        "app.py",
        "[html.escape(piece) for piece in split_before(caption.text, caption.words)]",
        "split_before(caption.text, caption.words)",
    ),
    Mutation(
        f"{FILES}fuzzing[config]",
        "a file that is not in UTF-8 is no mistake of a config",
        "config.py",
        "except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:",
        "except (yaml.YAMLError, RecursionError) as error:",
    ),
    Mutation(
        f"{FILES}fuzzing[override]",
        "a value has to be YAML",
        "config.py",
        "except (yaml.YAMLError, ValueError, RecursionError):\n            value = text",
        "except (ValueError, RecursionError):\n            value = text",
    ),
    Mutation(
        f"{FILES}fuzzing[csv]",
        "a line may have any number of columns",
        "data/tables.py",
        "if len(cells) != count:\n        hint",
        "if not count:\n        hint",
    ),
    Mutation(
        f"{FILES}fuzzing[token]",
        "a line without number is not looked for",
        "data/formats.py",
        "if parts is None:\n            raise",
        "assert parts\n        if not parts:\n            raise",
    ),
    Mutation(
        f"{FILES}fuzzing[karpathy]",
        "a missing key is no mistake of a file",
        "data/formats.py",
        UNLIKE,
        UNLIKE.replace("KeyError, ", ""),
    ),
    Mutation(
        f"{FILES}fuzzing[coco]",
        "a value of another kind is no mistake of a file",
        "data/formats.py",
        UNLIKE,
        UNLIKE.replace("TypeError, ", ""),
    ),
    Mutation(
        f"{FILES}fuzzing[json]",
        "a value of another kind is no mistake of a file",
        "data/formats.py",
        UNLIKE,
        UNLIKE.replace("TypeError, AttributeError, ", ""),
    ),
    Mutation(
        f"{FILES}fuzzing[jsonl]",
        "a value of another kind is no mistake of a file",
        "data/formats.py",
        UNLIKE,
        UNLIKE.replace("TypeError, AttributeError, ", ""),
    ),
    Mutation(
        f"{FILES}fuzzing[recognised]",
        "a format is looked for in UTF-8 alone",
        "data/formats.py",
        'raw.decode(encoding_of(raw), errors="replace")',
        "raw.decode(encoding_of(raw))",
    ),
    Mutation(
        f"{FILES}fuzzing[checkpoint]",
        "a wrong value is no damage",
        "cli/safe_load.py",
        "*(RuntimeError, ValueError, LookupError, TypeError",
        "*(RuntimeError, LookupError, TypeError",
    ),
    Mutation(
        f"{FILES}fuzzing[tar]",
        "damage of a tar is no mistake of a user",
        "data/tars.py",
        "except DAMAGED as error:",
        "except UnicodeDecodeError as error:",
    ),
    Mutation(
        f"{FILES}fuzzing[last]",
        "a state of training that lacks a part is no damage",
        "training/state.py",
        "except (*DAMAGED, ValidationError):",
        "except ValidationError:",
    ),
    Mutation(
        f"{FILES}fuzzing[picture]",
        "only an unknown format is a broken picture",
        "data/transforms.py",
        "except Exception as error:  # Pillow's",
        "except UnidentifiedImageError as error:  # Pillow's",
    ),
    Mutation(
        f"{FILES}fuzzing[drawer]",
        "halves of characters are drawn",
        "render/fonts.py",
        "\\ufeff\\ud800-\\udfff]",
        "\\ufeff]",
    ),
]


def main() -> None:
    chosen = [each for each in MUTATIONS if not sys.argv[1:] or any(word in each.row for word in sys.argv[1:])]
    if not chosen:
        raise UserError(f"no row is called {' or '.join(sys.argv[1:])}; see the table in {__file__}")
    for row in dict.fromkeys(each.row for each in chosen):
        faults = [each for each in chosen if each.row == row]
        caught = [is_caught(each) for each in faults]
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))
        command = f"python -m pytest {shlex.quote(row)}"
        if not any(found["command"] == command for found in rows):  # of which the row's own run then fills in the rest
            rows.append({"check": row, "tried": 0, "lost": 0, "figures": "not measured yet", "command": command})
        for found in rows:
            if found["command"] == command:
                found |= {"mutation": "; or ".join(each.broken for each in faults), "caught": all(caught)}
        write_atomically(RESULTS, as_json(rows) + b"\n")


def is_caught(mutation: Mutation) -> bool:
    """Whether the row fails in a copy of the project that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(
            ["cp", "--parents", "-t", folder, *files.decode().rstrip("\0").split("\0")], cwd=ROOT, check=True
        )
        mutation.put_into(Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "--short", mutation.row]
        command.append("--basetemp=left")  # what a test that fails leaves goes with the copy
        output = subprocess.run(command, cwd=folder, timeout=PATIENCE, capture_output=True, text=True).stdout
    reasons = re.findall("^(?:LOST|E  |/.*Error).*", output, re.MULTILINE) or output.splitlines()[-1:]
    caught = "\n1 failed" in output
    say(f"{'caught' if caught else 'NOT CAUGHT'}: {mutation.row}: {mutation.broken}: {reasons[0][:200]}")
    return caught


if __name__ == "__main__":
    raise SystemExit(run_script(main))
