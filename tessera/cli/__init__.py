"""The command line: ``tessera`` and ``tessera-exp``, thin click commands.

Every import beyond click happens inside a command, so that ``--help`` answers at once.
"""
