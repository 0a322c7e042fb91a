"""`python -m hf_selfjudge` is `hf-selfjudge`."""

from .cli.app import main


main()
