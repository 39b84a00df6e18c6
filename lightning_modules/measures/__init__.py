"""What is counted or summed over a split; one file a measure."""
