"""The documentation builds without a warning, and its reference is complete."""

import html
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_fedhaw
from lightning_fedhaw import (
    autodiff,
    bilevel,
    channel,
    comparing,
    data,
    deploy,
    diagnostics,
    extending,
    objectives,
    plotting,
    sweeping,
)
from lightning_fedhaw.deploy import flower, nvflare

ROOT = Path(__file__).parents[1]
JOURNALS = {
    "IEEE TCCN": "IEEE Transactions on Cognitive Communications and Networking",
    "IEEE TSP": "IEEE Transactions on Signal Processing",
    "IEEE TWC": "IEEE Transactions on Wireless Communications",
}
VENUES = "|".join([*JOURNALS, "AISTATS", "CVPR Findings", "CVPR", "ICLR", "ICML", "MLSys", "NeurIPS"])
SOURCE = re.compile(rf"Source(?:\*\*)?: ((?:(?!Source).){{1,250}}?)({VENUES}),? (\d{{4}})")


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "REPOSITORY_URL": "https://example.org/repository"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site/api/rules/index.html").read_text()
    assert 'id="lightning_fedhaw.FedHAWCallback"' in page
    assert ":class:" not in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "lr_gamma=1.0" in text, "signatures have the defaults"
    assert 'id="lightning_fedhaw.FedHAWCallback.step"' not in page, "internals are left out"
    rules = (tmp_path / "site/rules/index.html").read_text()
    assert 'href="https://example.org/repository"' in rules
    assert "md-footer__link--prev" in rules
    assert "md-footer__link--next" in rules
    assert (tmp_path / "site/tutorial/index.html").read_text().count("<img alt=") == 4
    assert r'<div class="arithmatex">\[' in rules
    assert "$$" not in rules, "all formulas are typeset"
    for file in re.findall(r'(?:src|href)="([^"#]*katex[^"]*)"', rules):
        assert (tmp_path / "site/rules" / file).exists()
    assert not re.search(r'(?:src|<link[^>]* href)="https?:', rules), "the site needs no network"


def test_the_reference_names_everything_public_once():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    paths = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    shown = [pkgutil.resolve_name(path) for path in paths]
    modules = (
        lightning_fedhaw,
        autodiff,
        bilevel,
        channel,
        comparing,
        sweeping,
        data,
        deploy,
        diagnostics,
        extending,
        flower,
        nvflare,
        objectives,
        plotting,
    )
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    public["FederatedCLI"] = pkgutil.resolve_name("lightning_fedhaw.cli.FederatedCLI")
    assert {path.rpartition(".")[2] for path in paths} == set(public)
    assert len(set(map(id, shown))) == len(shown)
    for name in lightning_fedhaw.__all__:
        assert f"lightning_fedhaw.{name}" in paths, "a page names what users write as they import it"


def test_papers_in_the_guide_are_those_of_the_citation_file():
    papers = set()
    urls = set()
    for reference in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]:
        venue = reference.get("journal") or reference.get("conference", {}).get("name")
        papers.add((reference["authors"][0]["family-names"], venue, reference["year"]))
        urls.add(reference["url"])
    sources = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = " ".join(page.read_text(encoding="utf-8").split())
        for number in re.findall(r"(?:arXiv[ :]|arxiv\.org/abs/)(\d{4}\.\d{5})", text):
            assert f"https://arxiv.org/abs/{number}" in urls, f"{page.name}: arXiv {number}"
        for authors, venue, year in SOURCE.findall(text):
            # Initials have one letter: "H.-Y. Chen, W.-L. Chao".
            first = re.search(r"[A-Z][\w-]+", authors)[0]
            sources.add((first, JOURNALS.get(venue, venue), int(year)))
    assert len(sources) > 25
    assert sources <= papers, sources - papers
