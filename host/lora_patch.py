from __future__ import annotations


def check_rows(rows):
    return True


def fingerprint(rows):
    return str(rows)
