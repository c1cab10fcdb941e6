"""The run-time check of shapes and types that the tests put on minids; an int counts as a float, as in typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
