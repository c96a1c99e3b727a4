"""Batch jobs: sites, sweeps, job scripts made from run files, and how the submitted jobs are."""
