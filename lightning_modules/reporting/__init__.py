"""From a run's results to what a person looks at: files, a table, a picture and a plain answer."""
