"""What plans do to images: quality by the eager reference, comparisons of policies, folders for official evaluators."""
