"""Curation: raw videos are cut into clips, scored, and judged for each condition.

    scenes.py       shots and black bars of a source, by PySceneDetect  ->  clips
    score.py        one clip decoded once: picture.py, motion.py, fingerprint.py, people.py, voice.py, sync.py
    store.py        results on disk, by digest of the content
    graph.py        the two steps as Apache Beam transforms, and how to run them
    duplicates.py, eligibility.py    scores and thresholds -> the fate of each clip, without decoding anything
    run.py, manifest.py, report.py   the whole of it, what it writes, the page

config.py has every setting and threshold. `data_pipelines.prepare` runs it for folders of raw videos.
"""
