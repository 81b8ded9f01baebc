"""Components that are broken in one way each: (class, check, what the message says)."""

import pytest

BROKEN = []


def broken(check_name, message):
    def add(cls):
        cls.__doc__ = cls.__doc__ if check_name == "documented" else "Broken."
        BROKEN.append(pytest.param(cls, check_name, message, id=f"{cls.kind}-{check_name}-{cls.__name__}"))
        return cls

    return add
