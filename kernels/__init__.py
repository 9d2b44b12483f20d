"""Operators of the toprovar namespace: reference, kernel and registration in one file each."""
