"""Readers of files that strangers wrote: nothing in them is executed, and all share the same bounds."""
