"""``python -m tessera``: the same as the command ``tessera``."""

from tessera.cli.main import main

main()
