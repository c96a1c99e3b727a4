"""report: one HTML file of one run or several, from what they left on disk."""
