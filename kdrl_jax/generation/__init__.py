"""Asking a model: one prompt, a file of them, or a conversation; alone or beside another model."""
