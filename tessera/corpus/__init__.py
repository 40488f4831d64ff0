"""From text with a licence to token shards with a digest: sources, steps, tokenizer, manifest.

The path runs forward only: ``recipe`` (what to read) -> ``sources`` (documents) -> ``clean`` and
``spool`` (what is kept, and in which split) -> ``tokenizer`` -> ``encode`` and ``shards`` ->
``manifest`` (what was built). ``build`` walks it, ``verify`` checks the result, ``chat`` turns
conversations into the same tokens. Nothing is imported here, so that a command line can show its
help without loading a tokenizer.
"""
