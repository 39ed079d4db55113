//go:build !linux

package main

import "context"

// keepSmall is of use on the systems that nodes run.
func keepSmall(context.Context) {}
