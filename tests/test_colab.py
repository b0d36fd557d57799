"""The notebook from top to bottom, in a kernel of its own and without a network.

Twice, with small settings after its cell of parameters: with the embedded models, as the hub is out
of reach, and with a small model that lies in the hub's cache under the name and commit it asks for.
Its first cell has tests of its own in test_colab_install.py.
"""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

import model_cases
import numpy as np
import pytest
import tokenizer_cases
from commands import HANG_S, xla_flags

from kdrl_jax.models import load_hf
from kdrl_jax.training.metrics import read_metrics

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "colab" / "kdrl_demo.ipynb"
PNG = b"\x89PNG\r\n"
SHOWN = ("install", "models", "train", "answers", "report", "export", "chat", "transformers")

SMALL = {
    "steps": 2,
    "offline": True,  # any connection that leaves the machine is an error
    "data.size": 64,
    "teacher.sft.steps": 3,
    "teacher.sft.batch_size": 8,
    "teacher.sft.problems": 64,
    "student.sft.steps": 2,
    "student.sft.batch_size": 8,
    "student.sft.problems": 64,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 8,
    "micro_batch": 8,
    "eval.every": 1,
    "eval.problems": 8,
    "eval.batch": 8,
    "health.teacher_every": 0,  # two programs fewer
}
EMBEDDED = {
    f"{role}.shape.{key}": size
    for role in ("teacher", "student")
    for key, size in {"hidden_size": 32, "num_heads": 1, "num_layers": 1, "mlp_size": 32}.items()
}
# In a chat template, as larger models are asked.
FROM_HUB = {
    "data.prompt_style": "kdrl",
    "data.max_prompt_tokens": 128,
    "data.prompt_buckets": (128,),
}


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


class Executed:
    """The notebook after its cells were run in `folder`, as in a checkout."""

    def __init__(self, folder: Path, changes: dict, hub: Path):
        self.folder = folder
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        for name in ("kdrl_jax", "configs", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "colab").mkdir()
        at = [cell.id for cell in notebook.cells].index("parameters")
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(f"CHANGES = {changes!r}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XLA_FLAGS", xla_flags())  # one device, as a newcomer has
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setenv("HF_HUB_CACHE", str(hub))
            nbclient.NotebookClient(
                notebook,
                timeout=HANG_S,
                kernel_name="python3",
                resources={"metadata": {"path": str(folder / "colab")}},
            ).execute()
        self.cells = code_cells(notebook)
        self.run, self.exported = (folder / "runs" / n for n in ("notebook", "notebook_exported"))

    def said(self, cell: str) -> str:
        """What a cell printed, on stdout and stderr."""
        return "".join(x["text"] for x in self.cells[cell].outputs if x.output_type == "stream")

    def shown(self, cell: str, kind: str) -> list[str]:
        """What a cell displayed of a MIME type."""
        outputs = [x["data"] for x in self.cells[cell].outputs if "data" in x]
        return [data[kind] for data in outputs if kind in data]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    return Executed(folder, SMALL | EMBEDDED, folder / "empty")


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from_hub")
    source = "".join(code_cells(nbformat.read(NOTEBOOK, as_version=4))["models"].source)
    ((name, commit),) = re.findall(r'"(HuggingFaceTB/[\w.-]+)@([0-9a-f]{40})"', source)
    stored = folder / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    rows = tokenizer_cases.write_hf(stored, extra=["\\boxed{"]).get_vocab_size()
    config = model_cases.CASES["llama_tied"] | {"vocab_size": rows, "eos_token_id": 0}
    model_cases.write_folder(stored, config)
    return Executed(folder, SMALL | FROM_HUB, folder / "hub")


@pytest.fixture(params=["embedded", "from_hub"])
def executed(request):
    return request.getfixturevalue(request.param)


def test_it_says_which_models_it_took(embedded, from_hub):
    assert "offline, and the cache" in embedded.said("models")
    assert embedded.said("models").endswith("the embedded models\n")
    assert from_hub.said("models") == "1 x cpu: the smollm2 models\n"
    config = json.loads((from_hub.run / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_curves_are_drawn_while_it_trains(executed):
    (picture,) = executed.shown("train", "image/png")
    assert base64.b64decode(picture).startswith(PNG)
    (line,) = executed.shown("train", "text/html")
    assert "everything is in runs/notebook" in line  # the last of the log
    assert "step 2/2" in (executed.folder / "runs" / "notebook.log").read_text()
    rows = read_metrics(executed.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    first, last = rows[0]["eval/accuracy"], rows[2]["eval/accuracy"]
    assert executed.said("train") == (
        f"held-out accuracy: {first:.1%} before, {last:.1%} after 2 steps\n"
    )


def answers(executed):
    """Problem → (text, verdict) before and after, as the table shows them."""
    (table,) = executed.shown("answers", "text/html")
    found = {}
    for row in re.findall(r"<tr><td>(.*?)</tr>", table):
        problem = html.unescape(row.partition("</td>")[0])
        cells = re.findall(r"<code>(.*?)</code><br>(.*?)</td>", row, re.DOTALL)
        found[problem] = [(html.unescape(text), verdict) for text, verdict in cells]
    return found


def test_answers_stand_side_by_side(executed):
    found = answers(executed)
    assert len(found) == 8
    assert all(len(sides) == 2 for sides in found.values())
    right = [sum(side[i][1] == "✓" for side in found.values()) for i in (0, 1)]
    assert executed.said("answers") == f"right: {right[0]} of 8 before, {right[1]} after\n"
    # The evaluation of the run asked the same problems at temperature 0.
    accuracy = [row["eval/accuracy"] for row in read_metrics(executed.run / "metrics.jsonl")]
    assert [accuracy[0] * 8, accuracy[-1] * 8] == right


def test_the_report_is_shown(executed):
    (picture,) = executed.shown("report", "image/png")
    assert base64.b64decode(picture).startswith(PNG)


def test_the_chat_answers_as_the_trainer_did(executed):
    """With the exported folder, against the trained student's column."""
    problem, (_, (after, _)) = next(iter(answers(executed).items()))
    assert problem
    assert executed.said("chat").removesuffix("\n") == after


def test_transformers_answer_as_the_chat_does(executed):
    pytest.importorskip("torch")
    assert executed.said("transformers") == executed.said("chat")


def test_the_export_has_the_same_logits_in_transformers(executed):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, params = load_hf(executed.exported)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 12))
    theirs = AutoModelForCausalLM.from_pretrained(executed.exported)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    hidden = model.apply(params, tokens, np.broadcast_to(np.arange(12), (2, 12)), np.ones((2, 12)))
    np.testing.assert_allclose(model.logits(params, hidden), logits, atol=1e-4)


def test_no_cell_says_anything_that_frightens(executed):
    for name, cell in executed.cells.items():
        loud = [x["text"] for x in cell.outputs if x.get("name") == "stderr"]
        assert not loud, (name, loud)


def test_the_kept_notebook_has_its_outputs():
    """Of real settings: run anew with `jupyter execute --inplace colab/kdrl_demo.ipynb`."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000
    cells = code_cells(nbformat.reads(text, as_version=4))
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    outputs = [x for cell in cells.values() for x in cell.outputs]
    assert {x.output_type for x in outputs} <= {"stream", "display_data", "execute_result"}
    shown = json.dumps([x for x in outputs if "image/png" not in x.get("data", {})])
    assert not re.findall(r"/(?:home|root|tmp|work|usr)/", shown)
    assert "Warning" not in shown
    assert [cells[name].outputs != [] for name in SHOWN] == [True] * len(SHOWN)
    said = re.search(r"held-out accuracy: ([\d.]+)% before, ([\d.]+)% after", shown)
    assert float(said[2]) > float(said[1])
