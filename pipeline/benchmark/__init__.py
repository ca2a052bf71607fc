"""What dropping tokens is worth: arms side by side in one run, and what the hardware could do at best.

    models, pictures -> subject -> generation, latency, encoding, stages, corpus -> record -> page

A section measures one thing and answers with plain values for the record; ``page`` makes Markdown of it.
"""
