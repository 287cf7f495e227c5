"""What-if questions: change something about a job, plan anew, compare."""
