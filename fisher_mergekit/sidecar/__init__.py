"""What was measured of a model, on disk.

    sidecar/
      header.json               provenance (`header.py`)
      fisher.safetensors        one file a kind, or shards and an index
      README.md                 a page to publish (`page.py`)

`checkpoint.py` reads the model's own files, `layout.py` says what transformers makes of them,
`reader.py` and `writer.py` the sidecar's, `location.py` says where a model's sidecar is; `ahead.py`
has the disk read what comes next. Nothing here knows how to measure or how to merge.
"""
