"""Losses written out slowly from their papers, to test the fast ones against."""
