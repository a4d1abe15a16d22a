"""Prepared datasets on disk and on remote storage.

Who checks what:

    dataset                 dataset.json: types, and names that stay in the folder
    index                   each index.json against itself, against dataset.json's counts, and against the files' sizes
    verdict.verify_shards   at a run's start, every file's hash; verdicts are kept, so that a restart reads little
    shards.verify_dataset   `python -m megaflux.data.verify`: every shard hashed, unpacked and counted, nothing trusted
    unpack                  a shard's hash when it is fetched or unpacked
    reading.quarantine      while training, what fails nevertheless: bad shards are set aside, their samples replaced
"""
