"""What every measurement uses: processes, energy, subjects, bars and result files."""
