"""Evaluating defenses: verdicts and how sure they are."""
