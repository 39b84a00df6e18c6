"""A Hugging Face Hub of one's own: it answers as the Hub does when files are listed, looked up and downloaded."""

import hashlib
import http.server
import json
import re
from pathlib import PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, urlsplit

REPOSITORIES = ("lab/nets", "datasets/lab/birds")
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `files`, of whichever repository is asked for, in two revisions; notes what is `asked`, and `sent`."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    sent: ClassVar[list[tuple[str, int, int]]] = []  # ranges of files: the first byte, and the one after the last

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("api/"):
            self.list_files(path, "recursive=true" in self.path)
        else:
            self.send_file(path, body)

    def send_file(self, path, body):
        repository, _, revision_and_file = path.partition("/resolve/")
        revision, _, file = revision_and_file.partition("/")
        self.asked.append(f"{self.command} {file}")
        missing = {
            "RepoNotFound": repository not in REPOSITORIES,
            "RevisionNotFound": revision not in (*COMMITS, *COMMITS.values()),
            "EntryNotFound": file not in self.files,
        }
        wrong = next((code for code, holds in missing.items() if holds), None)
        content = self.files.get(file, b"")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMITS.get(revision, revision)}
        if range_ := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
            first, last = int(range_[1]), min(int(range_[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
            self.sent.append((file, first, last + 1))
        self.answer(content, wrong, body, headers)

    def list_files(self, path, recursive):
        """Say what is in a repository, as a whole or below one of its folders."""
        _, _, tree = path.partition("/tree/")
        if not tree:
            return self.answer(json.dumps({"id": path.partition("/")[2], "sha": COMMITS["main"]}).encode())
        folder = PurePosixPath(tree.partition("/")[2])
        below = [file for file in map(PurePosixPath, self.files) if file.is_relative_to(folder)]
        folders = {parent for file in below for parent in file.parents if folder in parent.parents}
        found = [each for each in (*below, *folders) if recursive or each.parent == folder]
        kinds = [(str(each), self.files.get(str(each))) for each in found]
        entries = [
            {"type": "directory" if content is None else "file", "path": name, "size": len(content or b"")}
            | {"oid": hashlib.sha1(content or b"").hexdigest()}
            for name, content in kinds
        ]
        return self.answer(json.dumps(entries).encode(), None if below else "EntryNotFound")

    def answer(self, content, wrong=None, body=True, headers=None):
        content = b"" if wrong else content
        self.send_response(404 if wrong else 206 if "Content-Range" in (headers or {}) else 200)
        for name, value in ({"X-Error-Code": wrong} if wrong else headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass
