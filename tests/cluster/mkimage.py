#!/usr/bin/env python3
"""mkimage.py OUT.tar NAME:TAG SRC [KEY=VALUE...]: write a one-layer image archive for `ctr images import`, with no builder.

SRC is a root file system's tar or a folder. KEY=VALUE: entrypoint=/x (JSON list or one word), cmd=..., user=..., env=... (repeatable).
"""

import hashlib
import io
import json
import os
import sys
import tarfile

out, name, src = sys.argv[1:4]
config = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
for arg in sys.argv[4:]:
    key, value = arg.split("=", 1)
    if key == "env":
        config["Env"].append(value)
    elif key == "user":
        config["User"] = value
    else:
        config[key.capitalize()] = json.loads(value) if value.startswith("[") else [value]
if os.path.isdir(src):
    layer = out + ".layer"
    with tarfile.open(layer, "w") as t:

        def root(i):
            i.uid = i.gid = 0
            i.uname = i.gname = "root"
            i.mtime = 0
            return i

        for entry in sorted(os.listdir(src)):
            t.add(os.path.join(src, entry), entry, filter=root)
else:
    layer = src
digest = hashlib.sha256()
with open(layer, "rb") as f:
    for block in iter(lambda: f.read(1 << 20), b""):
        digest.update(block)
image = json.dumps(
    {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest.hexdigest()]},
        "history": [{"created_by": "mkimage"}],
    }
).encode()
cname = hashlib.sha256(image).hexdigest() + ".json"
with tarfile.open(out, "w") as t:

    def put(n, data):
        i = tarfile.TarInfo(n)
        i.size = len(data)
        t.addfile(i, io.BytesIO(data))

    put(cname, image)
    t.add(layer, "layer.tar")
    put("manifest.json", json.dumps([{"Config": cname, "RepoTags": [name], "Layers": ["layer.tar"]}]).encode())
if layer != src:
    os.remove(layer)
