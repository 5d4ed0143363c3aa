"""The import contracts of pyproject.toml: which module may know which, and where third parties may appear."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    outcome = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


def test_reading_a_config_and_asking_for_help_import_nothing_heavy() -> None:
    """The command line answers in a fraction of a second only as long as these stay out of it."""
    code = (
        "import sys, launcher.cli.main\n"
        "heavy = {'torch', 'megatron', 'deepspeed', 'ray', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_planning_a_run_imports_nothing_heavy() -> None:
    """Arithmetic for a laptop: a plan is there in a fraction of a second."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from launcher.cli.main import main\n"
        "runs = [str(path) for path in Path('configs').glob('*.yaml')]\n"
        "for words in (*(['plan', run] for run in runs), ['plan', '--validate']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, end.code\n"
        "heavy = {'torch', 'megatron', 'deepspeed', 'ray', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
