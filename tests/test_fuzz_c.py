"""libFuzzer on the C loader and on what it takes, from the files of tests/corpus: native/fuzz.c.

    BNNF_FUZZ_SECONDS=600 python -m pytest -m slow tests/test_fuzz_c.py -n 1 -s

The default suite runs the corpus through the same target: test_suite_c.py.
"""

import os
import re
import shutil

import pytest
from cc import HERE, WRAPPED, done, engine_sources, needs, objects, output_of
from corpus import CORPUS, RUNS, outcome

from bnnfree.format import from_bytes, schema

SECONDS = int(os.environ.get("BNNF_FUZZ_SECONDS", "600"))
FLAGS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-g1"]
# Memory may be refused; more than a file of this size can ask for is a finding, and so is a file that takes seconds
LIMITS = ["-max_len=20000", "-timeout=10", "-rss_limit_mb=4096", "-malloc_limit_mb=2048"]


def test_the_corpus_is_small_and_has_every_op_and_every_error():
    """After a change of the format: python tests/corpus.py"""
    blobs = {path.name: path.read_bytes() for path in CORPUS.iterdir()}
    outcomes = {name: outcome(blob) for name, blob in blobs.items()}
    assert outcomes == {name: name.split("-")[0] for name in blobs}
    assert set(outcomes.values()) == {RUNS, *schema.ERRORS}
    models = [from_bytes(blob) for name, blob in blobs.items() if outcomes[name] == RUNS]
    assert {op.name for model in models for op in model.ops} == set(schema.OPS)
    assert sum(map(len, blobs.values())) < 200_000 and len(blobs) < 50


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path):
    """For BNNF_FUZZ_SECONDS, 600 without it. A finding is left in the folder that the message names."""
    needs(["clang"], ["-fsanitize=address,undefined", FLAGS[1]], "bol", tmp_path)
    shutil.copytree(CORPUS, tmp_path / "corpus")
    sources = [HERE / "fuzz.c", HERE / "fence.c", *engine_sources()]
    made = objects(tmp_path / "objects", ["clang"], sources, *FLAGS, "-O1", "-pthread")
    output_of("clang", *FLAGS, "-pthread", *WRAPPED, *made, "-o", tmp_path / "fuzz", "-lm")
    options = [*LIMITS, f"-max_total_time={SECONDS}", "-print_final_stats=1", f"-artifact_prefix={tmp_path}/"]
    settings = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
    run = done(tmp_path / "fuzz", *options, tmp_path / "corpus", env=settings, timeout=SECONDS + 120)
    assert run.returncode == 0, f"{tmp_path}: {run.stderr[-6000:]}"
    number = int(re.findall(r"number_of_executed_units: (\d+)", run.stderr)[-1])
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", run.stderr)[-1]
    print(f"\n{number} files in {SECONDS} s; coverage: edges {covered[0]}, features {covered[1]}, corpus {covered[2]}")
    assert number > 20 * SECONDS
