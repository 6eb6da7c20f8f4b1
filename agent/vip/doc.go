// Package vip makes the operating system's addresses what ownership wants them to be:
// one idempotent Set, a Withdraw that waits for nobody, a Sweep of what an earlier run
// left, and a Watch for what others change.
//
// The kernel ends what the agent no longer vouches for: every address is put on with a
// limited lifetime, and stays only for as long as Set is repeated.
//
// What it is not: it decides nothing about who may hold a VIP, it tells the segment
// nothing (package announce does), and it touches no address but those it was opened with.
package vip
