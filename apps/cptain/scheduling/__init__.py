"""Batch jobs: sites, job scripts made from run files, and what a job finds out about its nodes."""
