"""What the README says is so: its commands, snippets, names and links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from test_layers import LAYERS

import hsgen
from hsgen import emit, passes, pipeline, planner, schedule
from hsgen.cli import app
from hsgen.spec import parse
from hsgen.target import Target

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
SPEC = ROOT / "examples" / "block_topk.yaml"
KERNEL = re.compile(r"(<!-- kernel:begin -->\n).*?(<!-- kernel:end -->)", re.DOTALL)


def blocks(language: str) -> list[str]:
    """Texts of the fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The set-up commands, each as its parts between `&&`."""
    return [line.split(" && ") for text in blocks("sh") for line in text.splitlines()]


def words(pattern: str) -> set[str]:
    return set(re.findall(pattern, TEXT))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def excerpt() -> str:
    """How the README shows the kernel that its spec becomes: its head, and its inner loop."""
    spec = parse(SPEC.read_text(encoding="utf-8"), str(SPEC))
    target = Target.named("h100")
    plan = schedule.schedule(passes.run(planner.plan(spec)), target, "bf16")
    source = emit.render(plan, pipeline.provenance(spec, target))["attend_selected.py"]
    head = source.splitlines()[:22]
    loop = source[source.index("    # full blocks") : source.index("    # partial blocks")]
    return "\n".join(
        ["```python", *head, "```", "", "and where every row sees every token, it runs", ""]
        + ["```python", *loop.rstrip().splitlines(), "```", ""]
    )


def test_code_comes_first():
    """Before line 20, and no more than a dozen lines of it."""
    assert TEXT.splitlines().index("```yaml") < 20
    assert len(blocks("yaml")[0].splitlines()) <= 12


def test_spec_is_the_example():
    (text,) = blocks("yaml")
    assert text == SPEC.read_text(encoding="utf-8")
    assert parse(text, "README.md").name == "block_topk"


def test_two_commands_do_the_set_up():
    first, second = commands()
    for command, extra in ((first, "cpu"), (second, "test")):
        assert command[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
        assert command[2] == f'pip install -e ".[{extra}]"'
    assert [len(first), len(second)] == [4, 4]


def test_continuous_integration_runs_the_second_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    here = (
        " && ".join(commands()[1])
        .replace(". .venv", '. "$folder/.venv')
        .replace("activate", 'activate"')
    )
    assert script[-1] == here.replace("venv .venv", 'venv "$folder/.venv"')


@pytest.mark.slow
def test_first_command_compiles():
    program, *arguments = commands()[0][-1].split()
    assert program == "hsgen"
    done = run(sys.executable, "-m", "hsgen", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("nsa for h100 (sm_90), bf16: 8 kernels in ")
    assert "verified nsa: " in done.stdout


def test_python_snippets_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    snippets = [text for text in blocks("python") if "hsgen.load_kernel" in text]
    assert len(snippets) == 3
    for text in snippets:
        exec(compile(text, "README.md", "exec"), namespace)
    assert list(namespace["o"].shape) == [1, 1, 32, 128]
    assert list(namespace["lse"].shape) == [1, 32, 512]


def test_example_runs():
    done = run(sys.executable, "examples/sparse_layer.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("output [1, 1200, 256], gradient")


def test_kernel_is_what_is_emitted(request: pytest.FixtureRequest):
    """`pytest --update-golden` rewrites it."""
    shown = KERNEL.sub(lambda found: found[1] + excerpt() + found[2], TEXT)
    if request.config.getoption("--update-golden"):
        README.write_text(shown, encoding="utf-8")
        return
    assert shown == TEXT


def test_layers_are_those_that_are_enforced():
    assert blocks("text") == [LAYERS]


def test_pipeline_sentence_is_that_of_the_package():
    (sentence,) = re.findall(r"^> (.*)$", TEXT, re.MULTILINE)
    assert sentence.replace("→", "->") in hsgen.__doc__


def test_commands_and_options_exist():
    group = typer.main.get_command(app)
    known = {name: command.params for name, command in group.commands.items()}
    shown = words(r"`hsgen (\w+)") | {parts[-1].split()[1] for parts in commands()[:1]}
    assert shown == set(known)
    inner = [c for g in group.commands.values() for c in getattr(g, "commands", {}).values()]
    known |= {command.name: command.params for command in inner}
    options = {option for params in known.values() for one in params for option in one.opts}
    assert words(r"(?<=[`\[ ])--\w[\w-]*") <= options


def test_error_codes_have_a_case():
    cases = {path.name[:5] for path in (ROOT / "tests" / "errors").glob("*.yaml")}
    assert words(r"HS\d{3}") <= cases


def test_environment_variables_are_read():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hsgen").rglob("*.py"))
    shown = words(r"\b(?:HSGEN|TRITON|XDG)_[A-Z_]+\b")
    assert shown
    assert not [name for name in shown if name not in source]
    assert set(re.findall(r"HSGEN_[A-Z_]+", source)) <= shown


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
