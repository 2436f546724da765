"""What is recorded beside figures."""

import subprocess

import pytest

from sparse_runtime.eval.latency import host


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("project", "ours"),
    [(None, False), ('name = "another-project"', False), ('name = "sparse-runtime"', True)],
)
def test_commit_is_this_projects_own(tmp_path, monkeypatch, project, ours):
    """Installed into an environment inside another repository, that one's commit says nothing."""
    module = tmp_path / ".venv" / "site-packages" / "sparse_runtime" / "eval" / "host.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(host, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert host.host_record()["commit"] is None
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    commit = host.host_record()["commit"]
    assert (commit is not None) == ours
