//go:build race

package agent_test

// raceDetector makes everything several times slower.
const raceDetector = true
