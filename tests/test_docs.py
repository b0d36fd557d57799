"""The docs build without a warning, and hold what the code has: every key, every module."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from commands import HANG_S
from test_train import ROOT

from kdrl_jax.config import flatten, load_config

sphinx = pytest.importorskip("sphinx", reason="the extra `docs` builds the pages")
pytest.importorskip("myst_parser", reason="the extra `docs` builds the pages")
pytest.importorskip("furo", reason="the extra `docs` builds the pages")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site")
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(output)]
    done = subprocess.run(
        [sys.executable, *build], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return output


def text_of(page):
    """What a page shows, without its markup."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", "", html)
    for name, sign in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("#39", "'"), ("amp", "&")):
        text = text.replace(f"&{name};", sign)
    return re.sub(r"\s+", " ", text)


def test_every_key_has_its_row(site):
    """Key, type and default, one behind the other, as a table shows them."""
    text = text_of(site / "configuration.html")
    for key, value in flatten(load_config(ROOT / "configs" / "base.py")).items():
        row = f" {key} {type(value).__name__} {value!r} "
        assert re.sub(r"\s+", " ", row) in text, key
    assert "½ℓ², the paper's" in text  # a comment behind a key
    assert "Problems sampled beyond prompts_per_step" in text  # one above it


def test_every_config_and_variant_is_there(site):
    text = text_of(site / "configs.html")
    for file in (ROOT / "configs").rglob("*.py"):
        if file.stem in ("__init__", "base", "shapes", "sources"):
            continue
        assert f"configs/{file.relative_to(ROOT / 'configs')}" in text
        for variant in re.findall(
            r'^    "(\w+)": ', file.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert f" :{variant} " in text, (file, variant)


def test_every_public_module_is_described(site):
    described = set()
    for page in (site / "api").glob("*.html"):
        found = re.findall(r'id="module-([\w.]+)"', page.read_text(encoding="utf-8"))
        assert not described & set(found)
        described |= set(found)
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / "kdrl_jax").rglob("*.py")
        if not re.search(r"/_[a-z]", str(file))
    }
    assert described == modules - {"kdrl_jax"}


def test_docstrings_are_rendered_as_markdown(site):
    """Tables, code and formulas of docstrings, jaxtyping's annotations, sections as fields."""
    html = (site / "api" / "objectives.html").read_text(encoding="utf-8")
    text = text_of(site / "api" / "objectives.html")
    assert re.search(r"<table.*?<code[^>]*><span class=\"pre\">k2</span>", html, re.DOTALL)
    assert "Float[Array, 'P G']" in text
    assert "Parameters" in text
    assert "ValueError" in text
    assert "`" not in text.replace("``", "")
    assert "<think>" in text_of(site / "api" / "rewards.html")


def test_the_mathematics_is_mathematics(site):
    html = (site / "math.html").read_text(encoding="utf-8")
    assert html.count('class="math') > 40
    assert "$" not in text_of(site / "math.html")
